"""What a person sees of a report. Nothing here decides anything."""
