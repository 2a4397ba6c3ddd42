"""The page, the files of an export, and two measurements side by side."""
