"""Accepted counts of engines: from files, and from the metrics of running servers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from specforge_lk.doctor.engine import fetch_counts, observe, read_counts, read_metrics
from specforge_lk.doctor.findings import Expected

VLLM = """
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 300.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 800.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 300.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 200.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 100.0
"""
SGLANG = """
sglang:spec_accept_length{model_name="m"} 9.0
sglang:spec_verify_calls_total{model_name="m"} 40.0
sglang:generation_tokens_total{model_name="m"} 110.0
sglang:num_requests_total{model_name="m"} 10.0
"""


def test_metrics_of_vllm_are_summed_over_engines():
    counts = read_metrics(VLLM, "here")
    assert (counts.drafts, counts.accepted, counts.heads) == (400, 300, 2)
    assert counts.tau == 1.75
    # Half of the steps accept nothing, a quarter one token, a quarter two.
    variance = (0.25 * 1 + 0.25 * 4) - 0.75**2
    assert counts.standard_error == pytest.approx((variance / 400) ** 0.5)


def test_metrics_of_sglang_count_tokens_behind_the_prefill():
    counts = read_metrics(SGLANG, "here")
    assert counts.tau == (110 - 10) / 40
    assert counts.standard_error is None and counts.heads is None


def test_metrics_of_a_running_server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(VLLM.encode())

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert fetch_counts(address) == fetch_counts(f"{address}/metrics")
        assert fetch_counts(address).tau == 1.75
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(OSError, match=r"/metrics does not answer"):
        fetch_counts(address, timeout=1)


@pytest.mark.parametrize(
    "written",
    [
        {"drafts": 4, "accepted_tokens": 3, "accepted_per_position": [2, 1]},
        {"rounds": 4, "accepted_per_position": [2, 1]},
        {
            "vllm:spec_decode_num_drafts": 4,
            "vllm:spec_decode_num_accepted_tokens": 3,
            "vllm:spec_decode_num_accepted_tokens_per_pos": [2, 1],
        },
    ],
)
def test_counts_of_a_file(written, tmp_path):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(written))
    counts = read_counts(path)
    assert (counts.tau, counts.heads) == (1.75, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "drafts is None"),
        ("[]", "one JSON object"),
        (
            '{"drafts": 9, "accepted_tokens": 8, "draft_tokens": 5}',
            "8 tokens were accepted of 5 drafted ones; give the counts of one engine",
        ),
        ('{"drafts": 0, "accepted_tokens": 0}', "no verification step"),
    ],
)
def test_counts_that_cannot_be_used(text, message, tmp_path):
    path = tmp_path / "counts.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_counts(path)


def test_a_server_without_speculative_decoding_is_no_engine():
    with pytest.raises(ValueError, match="no metrics of speculative decoding"):
        read_metrics("vllm:num_requests_running 0\n", "here")


def test_the_engine_is_within_both_intervals():
    counts = read_metrics(VLLM, "here")  # 1.75 ± 0.081
    assert observe(counts, Expected(1.80, (1.79, 1.81), 5, 100)).within
    assert not observe(counts, Expected(1.90, (1.89, 1.91), 5, 100)).within
    assert observe(counts, Expected(1.90, (1.75, 2.05), 5, 100)).within
    assert observe(counts, None).within is None
