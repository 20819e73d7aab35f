"""The server: owns a device and runs the transformer blocks of one span for many clients at once."""
