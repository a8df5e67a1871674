"""The connection to the API server: one configuration for our client and for kopf's watches."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import kopf
from kubernetes.aio import client, config

from penstock_operator.cluster.transport import Answer
from penstock_operator.errors import ApiUnavailable, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from penstock_operator.cluster.metrics import Metrics
    from penstock_operator.cluster.transport import Request


async def configure(kubeconfig: Path | None) -> Any:
    """Return the client's configuration. Raises SettingsError if there is none to be found."""
    found = client.Configuration()
    try:
        if kubeconfig is None:
            try:
                config.load_incluster_config(client_configuration=found)
            except config.ConfigException:
                await config.load_kube_config(client_configuration=found)
        else:
            await config.load_kube_config(str(kubeconfig), client_configuration=found)
    except (config.ConfigException, OSError) as error:
        raise SettingsError(
            f"there is no way to the API server: {error}",
            remedy="run it in a pod with a service account, or give --kubeconfig FILE",
        ) from error
    return found


async def connection_info(configuration: Any) -> kopf.ConnectionInfo:
    """Return what kopf needs to connect, with the token as it is now."""
    token = await configuration.get_api_key_with_prefix("BearerToken") or ""
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        token=token.rpartition(" ")[2] or None,
        scheme="Bearer" if token else None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
    )


class KubeTransport:
    """Sends requests with the Kubernetes client, whose models are not used: plain data is faster.

    Use it as a context manager.
    """

    def __init__(self, configuration: Any, metrics: Metrics) -> None:
        self._client = client.ApiClient(configuration)
        self._metrics = metrics

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        await self._client.close()

    async def send(self, request: Request, seconds: float) -> Answer:
        """See `transport.Transport`."""
        began, status = time.monotonic(), 0
        try:
            answer = await self._send(request, seconds)
            status = answer.status
        finally:
            metrics, verb = self._metrics, request.method
            metrics.api_seconds.labels(verb).observe(time.monotonic() - began)
            metrics.api_calls.labels(verb, _resource(request.path), str(status)).inc()
        return answer

    async def _send(self, request: Request, seconds: float) -> Answer:
        try:
            method, url, headers, body, *_ = await self._client.param_serialize(
                request.method,
                request.path,
                query_params=list(request.query.items()),
                header_params={"Content-Type": request.content_type, "Accept": request.accept},
                body=request.body,
                auth_settings=["BearerToken"],
            )
            response = await self._client.call_api(
                method, url, headers, body, _request_timeout=aiohttp.ClientTimeout(total=seconds)
            )
            text = await response.read()
        except (aiohttp.ClientError, client.ApiException, TimeoutError, OSError) as error:
            why = str(error) or type(error).__name__
            cause = f"{request.method} {request.path}: no answer within {seconds:.0f} s: {why}"
            raise ApiUnavailable(cause) from error
        return Answer(response.status, _object(text), request)


def _object(text: bytes) -> dict[str, Any]:
    """Return a JSON object; of anything else the beginning, as a message."""
    try:
        found = json.loads(text or b"{}")
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    return {"message": text[:200].decode(errors="replace")}


def _resource(path: str) -> str:
    """Return the resource that a path is about, such as pods or deployments/scale."""
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if parts and parts[0] == "namespaces" and len(parts) > 2:
        parts = parts[2:]
    return "/".join(part for position, part in enumerate(parts) if position != 1)
