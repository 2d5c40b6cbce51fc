"""How reports are presented: formats, pages, terminals. Nothing here decides anything."""
