"""Programs in the place of the `vllm` command."""

import os
import sys
from pathlib import Path

INTERPRETER = os.path.realpath(sys.executable)

# Answers questions about access codes like a server of the demo's documents. A file beside it,
# "wrong", names the kind of request in which it errs. Dense steps: 4 of a sparse request's 12, all
# of a dense one's 12, and 32 of one without a pace.
ANSWERING_SERVER = """
import http.server, json, pathlib, re, sys

counted = {"dense": 5, "sparse": 7, "decided": 3, "kept": 11, "candidates": 13}
here = pathlib.Path(__file__)
steps = "vllm:diffusion_num_denoising_steps_total"

class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, text, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        self.reply(
            f"# TYPE {steps} counter\\n"
            f'{steps}{{attention="dense"}} {counted["dense"]}.0\\n'
            f'{steps}{{attention="sparse"}} {counted["sparse"]}.0\\n'
            "# TYPE vllm:diffusion_num_committed_tokens_total counter\\n"
            f'vllm:diffusion_num_committed_tokens_total {counted["decided"]}.0\\n'
            "# TYPE vllm:sparsed_kept_blocks_total counter\\n"
            f'vllm:sparsed_kept_blocks_total {counted["kept"]}.0\\n'
            "# TYPE vllm:sparsed_candidate_blocks_total counter\\n"
            f'vllm:sparsed_candidate_blocks_total {counted["candidates"]}.0\\n',
            "text/plain",
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.reply(json.dumps({"count": len(body["prompt"].split())}), "text/json")
        prompt, settings = body["messages"][0]["content"], body["vllm_xargs"]
        is_sparse = settings.get("sparsed_enabled", True)
        kind = "fast" if "diffusion_threshold" in settings else "exact"
        kind += ", sparse" * is_sparse
        steps = settings.get("diffusion_steps", 12 if "fast" in kind else 32)
        sparse = max(0, steps - 4) if is_sparse else 0
        counted["sparse"] += sparse
        counted["decided"] += 24
        counted["dense"] += steps - sparse
        counted["kept"] += 30 * bool(sparse)
        counted["candidates"] += 100 * bool(sparse)
        key = re.search("What is the access code of the (.*)[?]", prompt)[1]
        answer = re.search(f"The access code of the {key} is (.*)[.]", prompt)[1]
        wrong = here.with_name("wrong")
        if wrong.exists() and wrong.read_text() == kind:
            answer = "00" + answer
        events = ""
        for piece in (answer[:2], answer[2:], ""):
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "demo"}
            events += "data: " + json.dumps({**chunk, "choices": [choice]}) + "\\n\\n"
        self.reply(events + "data: [DONE]\\n\\n", "text/event-stream")

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

# Healthy, with a process of its own that must not outlive it.
SERVER_WITH_WORKER = """
import http.server, pathlib, subprocess, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

worker = subprocess.Popen(["sleep", "600"])
pathlib.Path(__file__).with_name("worker").write_text(str(worker.pid))
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def write_program(path: Path, source: str) -> None:
    path.write_text(f"#!{INTERPRETER}\n{source}")
    path.chmod(0o755)
