"""From records to a page: plots, tables and one self-contained HTML file."""
