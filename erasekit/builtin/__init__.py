"""What erasekit brings along: registered like any plugin."""
