"""Making models from nothing: initialisation, objectives, schedules."""
