"""Expert server: routed experts of one modality, pure functions over gRPC."""
