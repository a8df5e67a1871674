"""Who is who: certificate authority, bearer tokens, and a kubeconfig for each user."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from e2e.cluster.process import run
from e2e.cluster.settings import NAME

if TYPE_CHECKING:
    from pathlib import Path

    from e2e.cluster.settings import Settings

ADMINISTRATOR = "admin"
_DAYS = "30"


@dataclass(frozen=True, slots=True)
class Identity:
    """Certificates and tokens in the run folder."""

    settings: Settings

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.settings.folder / "identity"

    def create(self) -> None:
        """Make all of them, new."""
        self.folder.mkdir(parents=True, mode=0o700)
        self._make_authority()
        self._make_server_certificate()
        run("openssl", "genrsa", "-out", self / "sa.key", "2048")
        run("openssl", "rsa", "-in", self / "sa.key", "-pubout", "-out", self / "sa.pub")
        self._make_users()

    def __truediv__(self, name: str) -> Path:
        """Return the path of a file."""
        return self.folder / name

    def kubeconfig(self, user: str) -> Path:
        """Return the kubeconfig of a user of the cluster."""
        return self.settings.kubeconfig if user == ADMINISTRATOR else self / f"{user}.kubeconfig"

    def _make_authority(self) -> None:
        run(
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", _DAYS),
            *("-subj", f"/CN={NAME}", "-keyout", self / "ca.key", "-out", self / "ca.crt"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"),
        )

    def _make_server_certificate(self) -> None:
        names = [f"DNS:kubernetes.default.svc{end}" for end in ("", ".cluster.local")]
        names += ["DNS:kubernetes", "DNS:kubernetes.default", "IP:127.0.0.1"]
        names += [f"IP:{self.settings.control_address}", f"IP:{self.settings.services}.0.1"]
        extensions = self / "server.ext"
        extensions.write_text(
            f"subjectAltName={','.join(names)}\nextendedKeyUsage=serverAuth\n"
            "authorityKeyIdentifier=keyid\nbasicConstraints=CA:FALSE\n",
            encoding="utf-8",
        )
        run(
            *("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=kube-apiserver"),
            *("-keyout", self / "server.key", "-out", self / "server.csr"),
        )
        run(
            *("openssl", "x509", "-req", "-days", _DAYS, "-in", self / "server.csr"),
            *("-CA", self / "ca.crt", "-CAkey", self / "ca.key", "-CAcreateserial"),
            *("-extfile", extensions, "-out", self / "server.crt"),
        )

    def _make_users(self) -> None:
        users = {
            ADMINISTRATOR: (ADMINISTRATOR, "system:masters"),
            "coredns": ("system:coredns", ""),
            **{
                name: (f"system:{name}", "")
                for name in ("kube-controller-manager", "kube-scheduler", "kube-proxy")
            },
            **{node: (f"system:node:{node}", "system:nodes") for node in self.settings.node_names},
        }
        rows = []
        for user, (name, group) in users.items():
            token = secrets.token_hex(16)
            rows.append(f'{token},{name},{name},"{group}"')
            self._write_kubeconfig(user, token)
        tokens = self / "tokens.csv"
        tokens.write_text("\n".join(rows) + "\n", encoding="utf-8")
        tokens.chmod(0o600)

    def _write_kubeconfig(self, user: str, token: str) -> None:
        cluster = {
            "server": self.settings.api_url,
            "certificate-authority": str(self / "ca.crt"),
        }
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": NAME, "cluster": cluster}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": NAME, "context": {"cluster": NAME, "user": user}}],
            "current-context": NAME,
        }
        path = self.kubeconfig(user)
        path.touch(0o600)
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML
