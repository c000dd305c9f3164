"""What CI systems read: one module a format. Text in, text out; nothing is written here."""
