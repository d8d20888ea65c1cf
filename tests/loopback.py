"""A Hugging Face Hub on 127.0.0.1 for the real client, with faults on demand. Standard library only, for tests.

Commits and references are kept in memory, contents in a folder under their hash. Large files go by Git LFS, and come
from a second port, as from the Hub's content network. Xet, its newer storage, is not spoken.
"""

import base64
import fnmatch
import hashlib
import json
import re
import secrets
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

PATIENCE = 600  # seconds for an answer: the client's own 10 may be too few on a busy machine
LARGE = ('*.safetensors', '*.bin', '*.pth', '*.png')
LICENCES = ('apache-2.0', 'mit', 'bsd-3-clause', 'cc-by-4.0', 'other', 'unknown')  # some of those that the Hub knows


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path match.

    `kind` is `status` (answer with the code `value`), `drop` (cut the connection after `value` bytes of the body, the
    request's where there is one), `truncate` (send only `value` bytes, and say so), `flip` (invert the byte at
    `value`), `etag` (announce the hash `value`) or `body` (send the bytes `value` instead).
    """

    kind: str
    path: str
    value: object = None
    method: str = 'GET'
    times: int = 1


@dataclass
class Repository:
    private: bool
    heads: dict = field(default_factory=dict)  # branch: commit
    commits: dict = field(default_factory=dict)  # commit: {path: (hash, size, large)}


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # of a client that has seen enough
            super().handle_error(request, client_address)


class Refused(Exception):
    def __init__(self, status, message, code=None, **body):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {'error': message, **body}


class Hub:
    """`with Hub(folder) as hub`: `hub.environment` makes the client talk to it as the user `me`."""

    user = 'me'

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.token = f'hf_{secrets.token_hex(17)}'
        self.repos, self.faults, self.requests, self.ranges, self.messages = {}, [], [], [], []
        self.lock = threading.RLock()
        self.before_commit = None  # called once, with the repository locked by nobody
        handler = type('BoundHandler', (Handler,), {'hub': self})
        self.servers = [Server(('127.0.0.1', 0), handler) for _ in range(2)]
        self.url, self.content_url = (f'http://127.0.0.1:{server.server_port}' for server in self.servers)

    @property
    def environment(self):
        patience = dict.fromkeys(('HF_HUB_ETAG_TIMEOUT', 'HF_HUB_DOWNLOAD_TIMEOUT'), str(PATIENCE))
        own = {'HF_ENDPOINT': self.url, 'HF_HUB_DISABLE_XET': '1', 'HF_TOKEN': self.token, 'NO_PROXY': '127.0.0.1'}
        return own | patience

    def __enter__(self):
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fail(self, kind, path, value=None, method='GET', times=1):
        self.faults.append(Fault(kind, path, value, method, times))

    def store(self, content):
        """Keep a content; its sha256."""
        digest = hashlib.sha256(content).hexdigest()
        (self.folder / digest).write_bytes(content)
        return digest

    def put(self, repo_id, files, private=False, branch='main'):
        """What somebody else pushed: set files ({path: bytes}, None deletes) in one commit."""
        repo = self.repos.setdefault(repo_id, Repository(private))
        changes = {}
        for path, content in files.items():
            changes[path] = None if content is None else self.entry(path, content)
        return self.commit(repo, branch, changes)

    def entry(self, path, content):
        return self.store(content), len(content), is_large(path, len(content))

    def commit(self, repo, branch, changes):
        with self.lock:
            old = repo.commits.get(repo.heads.get(branch), {})
            files = {path: entry for path, entry in {**old, **changes}.items() if entry is not None}
            state = json.dumps([sorted(files.items()), len(repo.commits), secrets.token_hex(4)])
            revision = hashlib.sha1(state.encode()).hexdigest()
            repo.commits[revision], repo.heads[branch] = files, revision
            return revision

    def files(self, repo_id, branch='main'):
        """{path: bytes} of a branch."""
        repo = self.repos[repo_id]
        return {p: (self.folder / e[0]).read_bytes() for p, e in repo.commits[repo.heads[branch]].items()}


def is_large(path, size):
    return size >= 10_000_000 or any(fnmatch.fnmatch(path, pattern) for pattern in LARGE)


def git_hash(content):
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def faults_of(metadata):
    """What the Hub refuses in a card's metadata, as far as its specification says, hub-docs' `modelcard.md`."""
    if metadata.get('license', 'other') not in LICENCES:
        yield '"license" must be one of [...]'
    for key in ('library_name', 'pipeline_tag'):
        if not isinstance(metadata.get(key, ''), str):
            yield f'"{key}" must be a string'
    for key in ('tags', 'datasets', 'metrics', 'base_model'):
        values = metadata.get(key, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            yield f'"{key}" must be a string or an array of strings'
    for index, model in enumerate(metadata.get('model-index', [])):
        if not isinstance(model.get('name'), str):
            yield f'"model-index[{index}].name" is required'
        for result in model.get('results') or [{}]:
            for holder, keys in (('task', ['type']), ('dataset', ['type', 'name'])):
                missing = [key for key in keys if not isinstance((result.get(holder) or {}).get(key), str)]
                yield from (f'"model-index[{index}].results.{holder}.{key}" is required' for key in missing)
            for metric in result.get('metrics') or [{}]:
                missing = [key for key in ('type', 'value') if metric.get(key) is None]
                yield from (f'"model-index[{index}].results.metrics.{key}" is required' for key in missing)


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: Hub

    def log_message(self, *_):
        pass

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        self.fault = self.take_fault(path)
        if self.fault and self.fault.kind == 'drop' and self.command in ('POST', 'PUT'):
            self.rfile.read(self.fault.value)
            return self.hang_up()
        self.body = self.read_body()
        self.hub.requests.append((self.command, path))
        if 'Range' in self.headers:
            self.hub.ranges.append(self.headers['Range'])
        try:
            if self.fault and self.fault.kind == 'status':
                raise Refused(self.fault.value, 'injected')
            given = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
            if given and given != self.hub.token:
                raise Refused(401, 'Invalid credentials in Authorization header')
            self.known = bool(given)
            for method, pattern, function in ROUTES:
                if method == ('GET' if self.command == 'HEAD' else self.command):
                    match = re.fullmatch(pattern, path)
                    if match:
                        return function(self, **match.groupdict())
            raise Refused(404, f'no such address: {self.command} {path}')
        except Refused as refused:
            headers = {'X-Error-Message': str(refused)} | ({'X-Error-Code': refused.code} if refused.code else {})
            self.answer(refused.body, refused.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def hang_up(self):
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def read_body(self):
        if (self.headers.get('Transfer-Encoding') or '').lower() != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        body = bytearray()
        while size := int(self.rfile.readline().split(b';')[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(body)

    def take_fault(self, path):
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times > 0 and fnmatch.fnmatch(path, fault.path) and self.command in fault.method.split():
                    fault.times -= 1
                    return fault
        return None

    def answer(self, content=None, status=200, headers=None):
        data = b'' if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {'Content-Type': 'application/json', 'Content-Length': len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def repo(self, repo_id, write=False):
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.known):
            raise Refused(404 if self.known else 401, 'Repository not found', 'RepoNotFound')
        if write and not (self.known and repo_id.startswith(f'{self.hub.user}/')):
            raise Refused(403, 'You have no right to write here')
        return repo

    def revision(self, repo, name):
        name = repo.heads.get(name, name)
        if name not in repo.commits:
            raise Refused(404, f'Invalid rev id: {name}', 'RevisionNotFound')
        return name

    def create(self):
        wanted = json.loads(self.body)
        owner = wanted.get('organization') or self.hub.user
        repo_id = f'{owner}/{wanted["name"]}'
        if not self.known or owner != self.hub.user:
            raise Refused(403 if self.known else 401, 'You have no right to create a model here')
        if repo_id in self.hub.repos:
            raise Refused(409, 'You already created this model repo', url=f'{self.hub.url}/{repo_id}')
        private = wanted.get('visibility') == 'private' or bool(wanted.get('private'))
        self.hub.put(repo_id, {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'}, private)
        self.answer({'url': f'{self.hub.url}/{repo_id}', 'id': repo_id, 'name': repo_id})

    def settings(self, repo_id):
        repo, wanted = self.repo(repo_id, write=True), json.loads(self.body)
        repo.private = wanted.get('visibility') == 'private' or bool(wanted.get('private'))
        self.answer({'private': repo.private})

    def branch(self, repo_id, branch):
        repo = self.repo(repo_id, write=True)
        if branch in repo.heads:
            raise Refused(409, 'Reference already exists')
        repo.heads[branch] = repo.heads['main']
        self.answer({})

    def validate(self):
        if 'json' in self.headers['Content-Type']:
            content = json.loads(self.body)['content']
        else:  # a form, from early versions of the client
            content = parse_qs(self.body.decode())['content'][0]
        match = re.match(r'---\n(.*?)\n---\n', content, re.S)
        try:
            found = yaml.safe_load(match.group(1)) if match else None
            errors = [*faults_of(found)] if isinstance(found, dict) else ['the card has no metadata']
        except yaml.YAMLError as error:
            errors = [str(error)]
        answer = {'errors': [{'message': error} for error in errors], 'warnings': []}
        self.answer(answer, 400 if errors else 200)

    def preupload(self, repo_id, branch):
        repo = self.repo(repo_id, write=True)
        there = repo.commits[self.revision(repo, branch)]
        files = []
        for wanted in json.loads(self.body)['files']:
            path, kind = wanted['path'], 'lfs' if is_large(wanted['path'], wanted['size']) else 'regular'
            known = {'oid': self.listed(path, there[path])[1]} if path in there else {}
            files.append({'path': path, 'uploadMode': kind, 'shouldIgnore': False, **known})
        self.answer({'files': files})

    def lfs_batch(self, repo_id):
        self.repo(repo_id, write=True)
        objects = []
        for wanted in json.loads(self.body)['objects']:
            answer = dict(wanted)
            if not (self.hub.folder / wanted['oid']).exists():
                upload = {'href': f'{self.hub.content_url}/upload/{wanted["oid"]}'}
                answer['actions'] = {'upload': upload, 'verify': {'href': f'{self.hub.url}/lfs-verify'}}
            objects.append(answer)
        self.answer({'transfer': 'basic', 'objects': objects})

    def upload(self, digest):
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refused(400, 'the content is not what was announced')
        self.hub.store(self.body)
        self.answer({}, headers={'ETag': f'"{digest}"'})

    def lfs_verify(self):
        wanted = json.loads(self.body)
        path = self.hub.folder / wanted['oid']
        if not path.exists() or path.stat().st_size != wanted['size']:
            raise Refused(404, 'the content was not uploaded')
        self.answer({})

    def commit(self, repo_id, branch):
        if action := self.hub.before_commit:
            self.hub.before_commit = None
            action()
        repo = self.repo(repo_id, write=True)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        with self.hub.lock:
            head, changes = self.revision(repo, branch), {}
            for line in lines:
                value = line['value']
                if line['key'] == 'header':
                    if value.get('parentCommit') not in (None, head):
                        raise Refused(412, 'A commit has happened since. Please refresh and try again.')
                    self.hub.messages.append(value['summary'])
                if line['key'] == 'file':
                    changes[value['path']] = self.hub.entry(value['path'], base64.b64decode(value['content']))
                if line['key'] == 'lfsFile':
                    content = self.hub.folder / value['oid']
                    if not content.exists():
                        raise Refused(400, 'the content was not uploaded')
                    changes[value['path']] = value['oid'], content.stat().st_size, True
                if line['key'] == 'deletedFile':
                    changes[value['path']] = None
            revision = self.hub.commit(repo, branch, changes)
        self.answer(
            {'success': True, 'commitOid': revision, 'commitUrl': f'{self.hub.url}/{repo_id}/commit/{revision}'}
        )

    def listed(self, path, entry):
        """(listing, hash that the client compares)."""
        digest, size, large = entry
        if large:
            return {'path': path, 'size': size, 'lfs': {'oid': digest, 'size': size, 'pointerSize': 134}}, digest
        return {'path': path, 'size': size}, git_hash((self.hub.folder / digest).read_bytes())

    def info(self, repo_id, revision='main'):
        repo = self.repo(repo_id)
        revision = self.revision(repo, revision)
        siblings = []
        for path, entry in sorted(repo.commits[revision].items()):
            listing, oid = self.listed(path, entry)
            lfs = {'lfs': {'sha256': entry[0], 'size': entry[1], 'pointerSize': 134}} if entry[2] else {}
            siblings.append({'rfilename': path, 'size': listing['size'], 'blobId': oid[:40], **lfs})
        self.answer({'id': repo_id, 'sha': revision, 'private': repo.private, 'siblings': siblings, 'tags': []})

    def tree(self, repo_id, revision):
        repo = self.repo(repo_id)
        entries = repo.commits[self.revision(repo, revision)]
        rows = [(self.listed(path, entry), path) for path, entry in sorted(entries.items())]
        self.answer([{'type': 'file', 'oid': oid[:40], **listing} for (listing, oid), _ in rows])

    def resolve(self, repo_id, revision, path):
        repo = self.repo(repo_id)
        revision = self.revision(repo, revision)
        headers = {'X-Repo-Commit': revision, 'Accept-Ranges': 'bytes'}
        if path not in repo.commits[revision]:
            return self.answer({'error': 'Entry not found'}, 404, {**headers, 'X-Error-Code': 'EntryNotFound'})
        digest, size, large = repo.commits[revision][path]
        announced = self.fault.value if self.fault and self.fault.kind == 'etag' else None
        if large:
            headers |= {'X-Linked-Etag': f'"{announced or digest}"', 'X-Linked-Size': size}
            return self.answer(None, 302, {**headers, 'Location': f'{self.hub.content_url}/content/{digest}'})
        etag = announced or git_hash((self.hub.folder / digest).read_bytes())
        return self.send_content(digest, {**headers, 'ETag': f'"{etag}"'})

    def content(self, digest):
        self.send_content(digest, {'ETag': f'"{digest}"', 'Accept-Ranges': 'bytes'})

    def send_content(self, digest, headers):
        kind, value = (self.fault.kind, self.fault.value) if self.fault else (None, None)
        data = (self.hub.folder / digest).read_bytes() if kind != 'body' else value
        if kind == 'flip':
            data = data[:value] + bytes([data[value] ^ 255]) + data[value + 1 :]
        status, start = 200, 0
        wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if wanted and len(data):
            status, start = 206, int(wanted[1])
            headers = {**headers, 'Content-Range': f'bytes {start}-{len(data) - 1}/{len(data)}'}
            data = data[start:]
        if kind == 'truncate':
            data = data[:value]
        self.send_response(status)
        for name, text in {'Content-Length': len(data), **headers}.items():
            self.send_header(name, str(text))
        self.end_headers()
        if self.command == 'HEAD':
            return
        self.wfile.write(data[:value] if kind == 'drop' else data)
        if kind == 'drop':
            self.wfile.flush()
            self.hang_up()


_ID = r'(?P<repo_id>[^/]+/[^/]+)'
ROUTES = [
    ('POST', r'/api/repos/create', Handler.create),
    ('PUT', rf'/api/models/{_ID}/settings', Handler.settings),
    ('POST', rf'/api/models/{_ID}/branch/(?P<branch>.+)', Handler.branch),
    ('POST', r'/api/validate-yaml', Handler.validate),
    ('POST', rf'/api/models/{_ID}/preupload/(?P<branch>.+)', Handler.preupload),
    ('POST', rf'/api/models/{_ID}/commit/(?P<branch>.+)', Handler.commit),
    ('POST', rf'/{_ID}\.git/info/lfs/objects/batch', Handler.lfs_batch),
    ('PUT', r'/upload/(?P<digest>[0-9a-f]{64})', Handler.upload),
    ('POST', r'/lfs-verify', Handler.lfs_verify),
    ('GET', rf'/api/models/{_ID}/tree/(?P<revision>[^/]+)/?', Handler.tree),
    ('GET', rf'/api/models/{_ID}/revision/(?P<revision>.+)', Handler.info),
    ('GET', rf'/api/models/{_ID}', Handler.info),
    ('GET', rf'/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)', Handler.resolve),
    ('GET', r'/content/(?P<digest>[0-9a-f]{64})', Handler.content),
]


def main():
    """Serve until interrupted, for whoever tries push and pull without the public Hub; prints what the shell needs."""
    with tempfile.TemporaryDirectory() as folder, Hub(folder) as hub:
        print(*(f'export {name}={value}' for name, value in hub.environment.items()), sep='\n', flush=True)
        threading.Event().wait()


if __name__ == '__main__':
    main()
