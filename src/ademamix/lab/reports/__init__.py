"""What came out, for people: pages, pictures, and what the paper claims."""
