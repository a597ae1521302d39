"""The documentation as a folder of HTML: `make site`, or `python -m docs.site`. Its source is the Markdown alone."""
