"""Real servers for the tests of faults."""

from ..servers.fixtures import ceph_server, moto_server, s3, ssh, sshd_server

__all__ = ["ceph_server", "moto_server", "s3", "ssh", "sshd_server"]
