"""Where a guest's time goes: what every exit cost, as a value to query, as a file, in reports."""
