from __future__ import annotations

from ..servers.fixtures import ceph_server, moto_server, s3, ssh, sshd_server

__all__ = ["ceph_server", "moto_server", "s3", "ssh", "sshd_server"]
