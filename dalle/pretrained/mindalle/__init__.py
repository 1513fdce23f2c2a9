"""minDALL-E (Kakao Brain)."""
