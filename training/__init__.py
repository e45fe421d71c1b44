"""The bundled model: its data, its trainer and its evaluation."""
