"""Everything about devices: meshes, placement of arrays, collectives, processes and compilation."""
