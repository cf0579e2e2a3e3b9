"""HTML and Markdown from what runs and studies leave behind."""
