"""Reading image and video files."""
