"""Invented people and places, and facts about them, in English and Chinese."""
