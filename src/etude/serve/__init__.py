"""The page: papers, methods, studies and the store, in a browser on this machine."""
