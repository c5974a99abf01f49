"""Every figure of the course. Figure functions take plain frames and arrays, draw with ``style`` and return the figure."""
