"""The catalogue of papers and their claims."""
