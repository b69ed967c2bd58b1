"""What everything else stands on: leaf paths, the mesh, the batch contract, settings, errors, logs."""
