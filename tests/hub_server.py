"""A small Hugging Face Hub on the loopback interface: the HTTP that huggingface_hub speaks, standard library only.

    with Hub() as hub:                                # then run a script with HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN
        hub.fail("user/name", "commit", 503, times=1) # its next commit is answered 503, those after it are taken
        hub.fail("user/name", "commit", "drop")       # every commit loses its connection
        hub.fail("user/name", "commit", 2.5)          # every commit takes 2.5 s
        hub.repos["user/name"]                        # what was committed last: {path: bytes}

What it answers, with which error code, follows the real Hub as far as the client can tell them apart. Every file is
taken in the commit itself ("regular"), so that there is no second protocol for large files, and of a repository there
is only the last commit.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER = "user"
TOKEN = "hf_tokenThatMayWriteToUser"
READ_TOKEN = "hf_tokenThatMayOnlyRead"
ROLES = {TOKEN: "write", READ_TOKEN: "read", "": None}


class Hub(ThreadingHTTPServer):
    """The server and what it holds. Starts in a thread on entering `with`, stops on leaving it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos = {}  # repo id -> {path: bytes}
        self.faults = {}  # (repo id, step) -> the faults of the next requests
        self.healed = threading.Event()
        self.requests = []  # (method, path, the Authorization header)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def fail(self, repo_id, step, fault, times=1000):
        """From now on, answer this step of this repository with a fault: a status, "drop", or seconds (float) to wait.

        step: "auth-check/write", "preupload", "commit", "revision" (model info), "tree" or "resolve" (download).
        """
        self.faults[repo_id, step] = [fault] * times

    def heal(self):
        """No more faults; a request that was still waiting loses its connection."""
        self.faults.clear()
        self.healed.set()
        self.healed = threading.Event()

    def was_asked(self, repo_id, step):
        """Whether a request for this step of this repository has come."""
        return any(f"{repo_id}/{step}" in path for _, path, _ in list(self.requests))

    def handle_error(self, request, client_address):
        """A client that was interrupted hangs up; that is no news."""


class Refused(Exception):
    """Ends a request: the status, the message and the code that the client tells errors apart by, more for the body."""

    def __init__(self, status, message, code=None, **more):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **more}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class Handler(BaseHTTPRequestHandler):
    """One request: find its route, apply the faults, check the token, answer."""

    protocol_version = "HTTP/1.1"

    def handle_any(self):
        """Every request comes through here."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        path = unquote(urlsplit(self.path).path)
        match, route = next((match, route) for pattern, route in ROUTES if (match := re.fullmatch(pattern, path)))
        try:
            self.apply_fault(**match.groupdict())
            answer = route(self, **match.groupdict())
        except Refused as error:
            self.send(error.status, json.dumps(error.body).encode(), error.headers)
        except ConnectionAbortedError:
            self.close_connection = True
        else:
            content, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
            self.send(200, content, headers)

    do_GET = do_HEAD = do_POST = handle_any

    def apply_fault(self, repo_id=None, step=None, path=None):
        """What the tests have in store for this step of this repository, if anything."""
        planned = self.server.faults.get((repo_id, step))
        fault = planned.pop() if planned else None
        if fault == "drop" or (isinstance(fault, float) and self.server.healed.wait(fault)):
            raise ConnectionAbortedError
        if isinstance(fault, int):
            raise Refused(fault, "This Hub has a bad day")

    def send(self, status, content, headers):
        """Send the answer; to HEAD, all of it but the content."""
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        """The log is Hub.requests, not stderr."""

    # Who is asking, and for what.

    def role(self):
        """What the token may do: "write", "read", or None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ROLES:
            raise Refused(401, "Invalid credentials in Authorization header")
        return ROLES[token]

    def check_may_write(self, repo_id):
        """The real Hub lets nobody write without a token, nor outside of what is theirs."""
        if self.role() is None:
            raise Refused(401, "Invalid username or password.")
        if self.role() != "write" or not repo_id.startswith(f"{USER}/"):
            raise Refused(403, "Forbidden: you must use a write token to upload to this repository.")

    def files_of(self, repo_id):
        """The files of a repository that exists; everybody may read."""
        if repo_id not in self.server.repos:  # without a token the real Hub does not say whether there is such a one
            raise Refused(404, "Repository not found", "RepoNotFound") if self.role() else Refused(401, "Not found")
        return self.server.repos[repo_id]

    # The routes.

    def whoami(self):
        if self.role() is None:
            raise Refused(401, "Invalid username or password.")
        return {"type": "user", "name": USER}

    def create_repo(self):
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        self.check_may_write(repo_id)
        url = f"{self.server.endpoint}/{repo_id}"
        if repo_id in self.server.repos:  # which exist_ok takes for a yes
            raise Refused(409, "You already created this model repo", url=url)
        self.server.repos[repo_id] = {}
        return {"url": url, "name": repo_id, "id": repo_id}

    def auth_check(self, repo_id, step):
        self.files_of(repo_id)
        if step == "auth-check/write":
            self.check_may_write(repo_id)
        return {}

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def preupload(self, repo_id, step):
        self.check_may_write(repo_id)
        asked = json.loads(self.body)["files"]
        return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]}

    def create_commit(self, repo_id, step):
        self.check_may_write(repo_id)
        files = dict(self.files_of(repo_id))
        for operation in map(json.loads, self.body.splitlines()[1:]):  # one per line, after a header
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, f"this server does not know {operation['key']}")
        self.server.repos[repo_id] = files
        commit = sha1(files)
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{commit}"}

    def model_info(self, repo_id, step):
        files = self.files_of(repo_id)
        siblings = [{"rfilename": path} for path in files]
        return {"id": repo_id, "sha": sha1(files), "private": False, "tags": [], "siblings": siblings}

    def list_tree(self, repo_id, step):
        files = self.files_of(repo_id).items()
        return [{"type": "file", "path": path, "size": len(file), "oid": sha1(file)} for path, file in files]

    def download(self, repo_id, step, path):
        files = self.files_of(repo_id)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        return files[path], {"ETag": f'"{sha1(files[path])}"', "X-Repo-Commit": sha1(files)}

    def unknown(self):
        raise Refused(404, f"this server has no {self.command} {self.path}")


def sha1(content):
    """An id that changes with the content, of a file; or with the files, of a commit."""
    whole = content if isinstance(content, bytes) else str([(path, sha1(content[path])) for path in content]).encode()
    return hashlib.sha1(whole).hexdigest()


REPO = r"(?P<repo_id>[^/]+/[^/]+)"
ROUTES = [
    ("/api/whoami-v2", Handler.whoami),
    ("/api/repos/create", Handler.create_repo),
    (f"/api/models/{REPO}/(?P<step>auth-check(/write)?)", Handler.auth_check),
    ("/api/validate-yaml", Handler.validate_yaml),  # upload_folder: of the README.md, which the tests read themselves
    (f"/api/models/{REPO}/(?P<step>preupload)/main", Handler.preupload),  # how to send each file
    (f"/api/models/{REPO}/(?P<step>commit)/main", Handler.create_commit),
    (f"/api/models/{REPO}(/(?P<step>revision)/[^/]+)?", Handler.model_info),  # snapshot_download
    (f"/api/models/{REPO}/(?P<step>tree)/[^/]+", Handler.list_tree),  # always the whole tree
    (f"/{REPO}/(?P<step>resolve)/[^/]+/(?P<path>.+)", Handler.download),  # HEAD for the headers, then GET
    (".*", Handler.unknown),
]
