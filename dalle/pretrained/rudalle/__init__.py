"""ruDALL-E (Sber)."""
