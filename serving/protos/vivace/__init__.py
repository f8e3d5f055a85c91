"""Generated code is here so that it can be imported as part of the package."""
