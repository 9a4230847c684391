"""A small Hugging Face Hub on the loopback interface: the HTTP that huggingface_hub speaks, standard library only.

    with Hub() as hub:                                # then run a script with HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN
        hub.fail("user/name", "commit", 503, times=1) # its next commit is answered 503, those after it are taken
        hub.fail("user/name", "commit", "drop")       # every commit loses its connection
        hub.fail("user/name", "commit", 2.5)          # every commit takes 2.5 s
        hub.files("user/name")                        # what was committed: {path: bytes}

What it answers, with which error code, follows the real Hub as far as the client can tell them apart. Every file is
taken in the commit itself ("regular"), so that there is no second protocol for large files.
"""

import base64
import hashlib
import json
import math
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER = "user"
TOKEN = "hf_tokenThatMayWriteToUser"
READ_TOKEN = "hf_tokenThatMayOnlyRead"


@dataclass
class Request:
    """One line of the log."""

    method: str
    path: str
    headers: dict
    status: int | str = "pending"


class Hub(ThreadingHTTPServer):
    """The server and what it holds. Starts in a thread on entering `with`, stops on leaving it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.tokens = {TOKEN: "write", READ_TOKEN: "read"}
        self.repos = {}  # repo id -> {commit: {path: bytes}}, oldest commit first
        self.faults = {}  # (repo id, step) -> [fault, how many times more]
        self.healed = threading.Event()
        self.requests = []
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def fail(self, repo_id, step, fault, times=math.inf):
        """From now on, answer this step of this repository with a fault: a status, "drop", or seconds (float) to wait.

        step: "auth-check/write", "preupload", "commit", "revision" (model info), "tree" or "resolve" (download).
        """
        self.faults[repo_id, step] = [fault, times]

    def heal(self):
        """No more faults; a request that was still waiting loses its connection."""
        self.faults.clear()
        self.healed.set()
        self.healed = threading.Event()

    def files(self, repo_id, revision="main"):
        """The files of a repository as {path: bytes}, without the .gitattributes that the Hub puts into each."""
        commits = self.repos[repo_id]
        files = commits[next(reversed(commits)) if revision == "main" else revision]
        return {path: content for path, content in files.items() if path != ".gitattributes"}

    def commit(self, repo_id, files):
        """Add a commit that leaves the repository with exactly these files; returns its id."""
        files = {".gitattributes": b"*.pt filter=lfs diff=lfs merge=lfs -text\n", **files}
        commits = self.repos.setdefault(repo_id, {})
        commit = hashlib.sha1(f"{repo_id} {len(commits)}".encode()).hexdigest()
        commits[commit] = files
        return commit

    def wait_for(self, step, repo_id, seconds=60):
        """Wait until this step of this repository has been asked for."""
        deadline = time.monotonic() + seconds
        while not any(f"{repo_id}/{step}" in request.path for request in list(self.requests)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {step} of {repo_id} in {seconds} s")
            time.sleep(0.01)

    def handle_error(self, request, client_address):
        """A client that was interrupted hangs up; that is no news."""


class Answer(Exception):
    """Ends a request early: the status, the message and the code that the client tells errors apart by."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    """One request: find its route, check the token, apply the faults, answer."""

    protocol_version = "HTTP/1.1"

    def handle_any(self):
        """Every request comes through here."""
        self.url = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.entry = Request(self.command, self.path, dict(self.headers))
        self.server.requests.append(self.entry)
        try:
            for method, pattern, route in ROUTES:
                match = re.fullmatch(pattern, unquote(self.url.path))
                if match and self.command in method:
                    self.apply_fault(match)
                    with self.server.lock:
                        answer = route(self, **match.groupdict())
                    break
            else:
                raise Answer(404, f"this server has no {self.command} {self.path}")
        except Answer as error:
            headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            self.send(error.status, json.dumps({"error": error.message}).encode(), headers)
        except ConnectionAbortedError:
            self.entry.status = "dropped"
            self.close_connection = True
        else:
            if answer is not None:
                self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_GET = do_HEAD = do_POST = handle_any

    def apply_fault(self, match):
        """What the tests have in store for this step of this repository, if anything."""
        planned = self.server.faults.get((match.groupdict().get("repo_id"), match.groupdict().get("step")), [None, 0])
        fault, planned[1] = planned[0] if planned[1] > 0 else None, planned[1] - 1
        if fault == "drop" or (isinstance(fault, float) and self.server.healed.wait(fault)):
            raise ConnectionAbortedError
        if isinstance(fault, int):
            raise Answer(fault, "This Hub has a bad day")

    def send(self, status, content, headers):
        """Send the answer; to HEAD, all of it but the content."""
        self.entry.status = status
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
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if scheme != "Bearer" or token not in self.server.tokens:
            raise Answer(401, "Invalid credentials in Authorization header")
        return self.server.tokens[token]

    def check_may_write(self, repo_id):
        """The real Hub lets nobody write without a token, nor outside of what is theirs."""
        role = self.role()
        if role is None:
            raise Answer(401, "Invalid username or password.")
        if role != "write" or not repo_id.startswith(f"{USER}/"):
            raise Answer(403, "Forbidden: you must use a write token to upload to this repository.")

    def commits_of(self, repo_id):
        """The commits of a repository that exists; everybody may read."""
        role = self.role()
        if repo_id not in self.server.repos:
            # Without a token the real Hub does not say whether there is such a repository.
            raise Answer(404 if role else 401, "Repository not found", "RepoNotFound" if role else None)
        return self.server.repos[repo_id]

    def files_at(self, repo_id, revision):
        """A commit's id and its {path: bytes}."""
        commits = self.commits_of(repo_id)
        commit = next(reversed(commits)) if revision in (None, "main") else revision
        if commit not in commits:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, commits[commit]

    # The routes: one per client call.

    def whoami(self):
        """HfApi.whoami."""
        if self.role() is None:
            raise Answer(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.role()}
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"accessToken": token}}

    def create_repo(self):
        """HfApi.create_repo: 409 where it exists, which exist_ok takes for a yes; 403 in a foreign namespace."""
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        self.check_may_write(repo_id)
        answer = {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id not in self.server.repos:
            self.server.commit(repo_id, {})
            return answer
        self.send(409, json.dumps({"error": "You already created this model repo", **answer}).encode(), {})

    def auth_check(self, repo_id, step):
        """HfApi.auth_check, with write=True where the path ends so."""
        self.commits_of(repo_id)
        if step == "auth-check/write":
            self.check_may_write(repo_id)
        return {}

    def validate_yaml(self):
        """HfApi.upload_folder and create_commit, for the README.md; as much of a check as needs no YAML parser."""
        if not re.match(r"---\n.*?\n---\n", json.loads(self.body)["content"], re.DOTALL):
            self.send(400, json.dumps({"errors": [{"message": "no metadata"}], "warnings": []}).encode(), {})
            return None
        return {"errors": [], "warnings": []}

    def preupload(self, repo_id, step, revision):
        """HfApi.upload_folder: how to send each file, and which version of it is already here."""
        self.check_may_write(repo_id)
        _, files = self.files_at(repo_id, revision)
        asked = [file["path"] for file in json.loads(self.body)["files"]]
        oids = {path: blob_id(files[path]) if path in files else None for path in asked}
        how = {"uploadMode": "regular", "shouldIgnore": False}
        return {"files": [{"path": path, "oid": oid, **how} for path, oid in oids.items()]}

    def create_commit(self, repo_id, step, revision):
        """HfApi.upload_folder and create_commit: one operation per line, after a header."""
        self.check_may_write(repo_id)
        files = dict(self.files_at(repo_id, revision)[1])
        for operation in map(json.loads, self.body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                if value["path"] not in files:
                    raise Answer(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            elif operation["key"] == "deletedFolder":
                files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
            elif operation["key"] != "header":
                raise Answer(400, f"this server does not know {operation['key']}")
        commit = self.server.commit(repo_id, files)
        url = f"{self.server.endpoint}/{repo_id}/commit/{commit}"
        return {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}

    def model_info(self, repo_id, step=None, revision=None):
        """HfApi.model_info and repo_info; the first thing that snapshot_download asks."""
        commit, files = self.files_at(repo_id, revision)
        siblings = [{"rfilename": path} for path in files]
        return {"id": repo_id, "modelId": repo_id, "sha": commit, "private": False, "tags": [], "siblings": siblings}

    def list_tree(self, repo_id, step, revision):
        """HfApi.list_repo_tree, which list_repo_files and snapshot_download build on; always the whole tree."""
        _, files = self.files_at(repo_id, revision)
        sizes = {path: {"size": len(content), "oid": blob_id(content)} for path, content in files.items()}
        return [{"type": "file", "path": path, **about} for path, about in sizes.items()]

    def download(self, repo_id, step, revision, path):
        """hf_hub_download: HEAD for the metadata in the headers, then GET."""
        commit, files = self.files_at(repo_id, revision)
        if path not in files:
            raise Answer(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{blob_id(files[path])}"', "X-Repo-Commit": commit, "Accept-Ranges": "none"}
        self.send(200, files[path], {"Content-Type": "application/octet-stream", **headers})


def blob_id(content):
    """The id that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


REPO = r"(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (["GET"], "/api/whoami-v2", Handler.whoami),
    (["POST"], "/api/repos/create", Handler.create_repo),
    (["POST"], "/api/validate-yaml", Handler.validate_yaml),
    (["GET"], f"/api/models/{REPO}/(?P<step>auth-check(/write)?)", Handler.auth_check),
    (["POST"], f"/api/models/{REPO}/(?P<step>preupload)/{REVISION}", Handler.preupload),
    (["POST"], f"/api/models/{REPO}/(?P<step>commit)/{REVISION}", Handler.create_commit),
    (["GET"], f"/api/models/{REPO}", Handler.model_info),
    (["GET"], f"/api/models/{REPO}/(?P<step>revision)/{REVISION}", Handler.model_info),
    (["GET"], f"/api/models/{REPO}/(?P<step>tree)/{REVISION}", Handler.list_tree),
    (["HEAD", "GET"], f"/{REPO}/(?P<step>resolve)/{REVISION}/(?P<path>.+)", Handler.download),
]
