"""From one low-resolution photo to faces that scale down to it."""
