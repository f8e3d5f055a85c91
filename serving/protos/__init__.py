"""The API as protobuf, and the code generated from it."""
