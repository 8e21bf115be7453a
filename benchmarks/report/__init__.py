"""What a run says, for readers: tables, charts, pages, and two runs compared."""
