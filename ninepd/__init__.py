"""A vhost-user virtio-9p server in which a fid is an open descriptor."""

__version__ = "0.1.0"
