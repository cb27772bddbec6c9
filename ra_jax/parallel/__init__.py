"""Everything about devices: meshes, where arrays live, collectives, processes, compiled programs."""
