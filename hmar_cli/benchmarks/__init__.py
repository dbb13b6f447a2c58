"""Speed: attention and whole training steps, checked before they are timed, and sampling."""
