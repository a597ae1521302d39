"""Every parser of ours that reads what somebody else wrote, and two ways to try it: hypothesis and atheris."""
