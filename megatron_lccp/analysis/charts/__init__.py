"""What a figure shows, and how it is drawn: matplotlib for files, plotly.js for the page."""
