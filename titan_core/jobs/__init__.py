"""One function a command: config in, result out."""
