"""`horcrux-cli`: one module for each topic. What takes long to import is imported on use."""
