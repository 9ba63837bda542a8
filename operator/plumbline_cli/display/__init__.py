"""What people see: words, tables and the live view."""
