"""A stand-in for AWS on loopback: moto, and before it what moto lacks, CloudFront's policies of response
headers. Those are held to what AWS asks of a request. Prints its address, then serves until killed."""

import json
import logging
import threading
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moto.cloudfront import models
from moto.server import ThreadedMotoServer

XMLNS = "http://cloudfront.amazonaws.com/doc/2020-05-31/"
AT = "/2020-05-31/response-headers-policy"
# AWS takes these in a policy's security headers only.
SECURITY = {"x-content-type-options", "strict-transport-security", "x-frame-options",
            "referrer-policy", "content-security-policy", "x-xss-protection"}
policies = {}  # id -> [etag, config as XML]
lock = threading.Lock()


class Wrong(Exception):
    def __init__(self, status, code, message):
        super().__init__(message)
        self.status, self.code = status, code


def checked(body):
    """The configuration in a request, as AWS would take it."""
    config = ET.fromstring(body)
    tag = lambda name: f"{{{XMLNS}}}{name}"
    if config.tag != tag("ResponseHeadersPolicyConfig") or not config.findtext(tag("Name")):
        raise Wrong(400, "MalformedXML", "no configuration with a name")
    custom = config.find(tag("CustomHeadersConfig"))
    items = custom.find(tag("Items")) if custom is not None else None
    rows = list(items) if items is not None else []
    if custom is not None and int(custom.findtext(tag("Quantity"))) != len(rows):
        raise Wrong(400, "InconsistentQuantities", "Quantity is not the number of headers")
    for row in rows:
        name = row.findtext(tag("Header"))
        if not name or row.findtext(tag("Value")) is None or row.findtext(tag("Override")) not in ("true", "false"):
            raise Wrong(400, "InvalidArgument", f"header {name!r}")
        if name.lower() in SECURITY:
            raise Wrong(400, "InvalidArgument", f"{name} is no custom header")
    return config.findtext(tag("Name")), body.decode().split("?>", 1)[-1]


def shown(key):
    return (f"<Id>{key}</Id><LastModifiedTime>2026-01-01T00:00:00Z</LastModifiedTime>{policies[key][1]}")


def policy(method, path, body, match):
    """Status, headers and XML of an answer."""
    key = path.removeprefix(AT).strip("/").split("?")[0]
    if method == "GET" and not key:
        rows = "".join(f"<ResponseHeadersPolicySummary><Type>custom</Type><ResponseHeadersPolicy>{shown(k)}"
                       "</ResponseHeadersPolicy></ResponseHeadersPolicySummary>" for k in policies)
        return 200, {}, (f'<ResponseHeadersPolicyList xmlns="{XMLNS}"><MaxItems>100</MaxItems>'
                         f"<Quantity>{len(policies)}</Quantity><Items>{rows}</Items></ResponseHeadersPolicyList>")
    if method == "POST":
        name, config = checked(body)
        if any(f"<Name>{name}</Name>" in other for _, other in policies.values()):
            raise Wrong(409, "ResponseHeadersPolicyAlreadyExists", name)
        key = f"policy-{len(policies) + 1}"
        policies[key] = ["E1", config]
    elif key not in policies:
        raise Wrong(404, "NoSuchResponseHeadersPolicy", key)
    elif method == "PUT":
        if match != policies[key][0]:
            raise Wrong(412, "PreconditionFailed", f"If-Match: {match}")
        policies[key] = [policies[key][0] + "1", checked(body)[1]]
    status = 201 if method == "POST" else 200
    return status, {"ETag": policies[key][0]}, f'<ResponseHeadersPolicy xmlns="{XMLNS}">{shown(key)}</ResponseHeadersPolicy>'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith(AT):
            with lock:
                try:
                    status, headers, text = policy(self.command, self.path, body, self.headers.get("If-Match"))
                except Wrong as wrong:
                    status, headers = wrong.status, {}
                    text = (f'<ErrorResponse xmlns="{XMLNS}"><Error><Type>Sender</Type><Code>{wrong.code}</Code>'
                            f"<Message>{wrong}</Message></Error><RequestId>1</RequestId></ErrorResponse>")
            self.reply(status, {**headers, "Content-Type": "text/xml"}, text.encode())
            return
        request = urllib.request.Request(BEHIND + self.path, data=body or None, method=self.command)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "content-length"):
                request.add_unredirected_header(name, value)
        try:
            with urllib.request.urlopen(request) as got:
                self.reply(got.status, dict(got.headers.items()), got.read())
        except urllib.error.HTTPError as error:
            self.reply(error.code, dict(error.headers.items()), error.read())

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def reply(self, status, headers, body):
        self.send_response_only(status)
        length = headers.pop("Content-Length", None) if self.command == "HEAD" else None
        for name, value in headers.items():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


# moto forgets which access control an origin has.
forgetful = models.Origin.__init__


def remembering(self, origin):
    forgetful(self, origin)
    self.origin_access_control_id = origin.get("OriginAccessControlId")


models.Origin.__init__ = remembering
logging.getLogger("werkzeug").setLevel(logging.ERROR)
moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
moto.start()
host, port = moto.get_host_and_port()
BEHIND = f"http://{host}:{port}"
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(json.dumps({"listening": f"http://127.0.0.1:{server.server_port}"}), flush=True)
server.serve_forever()
