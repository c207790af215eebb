"""Readers of annotated images: many formats in, one :class:`wsiengine.datasets.rows.DetectionSet` out."""
