"""The small model of this repository: the tasks it is asked, and how it is trained."""
