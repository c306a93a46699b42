"""What a run says: summary, validity, tables."""
