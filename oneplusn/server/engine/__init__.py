"""The engine: schedules sequences into steps, runs them on one base model, samples, commits."""
