"""What several test files share: models, enumerable worlds, records and training runs."""
