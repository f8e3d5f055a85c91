"""What stands between the ops written in Triton and a GPU."""
