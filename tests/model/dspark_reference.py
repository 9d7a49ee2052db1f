"""The DSpark drafter once more: dense, in loops, from the whole sequence; nothing of ours in it.

Written from ports of inference/model.py of DeepSeek-V4-Flash-0731, and the equations of the paper
(arXiv 2607.05147) as nano-deepseek-v4 has them. Everything is fp32, every linear layer a matrix.
"""

import math

import torch


def rms(x, weight, eps):
    return weight * x / math.sqrt(float((x * x).sum()) / len(x) + eps)


def turned(x, position, n_rope, theta, sign=1):
    """Pairs of neighbours among the last channels, each by an angle of its own."""
    out = x.tolist()
    for pair in range(n_rope // 2):
        angle = sign * position * theta ** (-2 * pair / n_rope)
        i = len(x) - n_rope + 2 * pair
        a, b = out[i], out[i + 1]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return torch.tensor(out)


class Reference:
    """`weights` by official names; `config` as ours."""

    def __init__(self, weights, config):
        self.w, self.c = weights, config

    def guesses(self, means, token, previous=lambda before, base: before):
        """What follows `token`, behind a context of which `means` has a row for each target.

        `means` is a list of [n_context, dim], in the order of the layers. `previous` says whose
        guess the correction looks up: that before, or by mistake another one.
        """
        w, c, last = self.w, self.c, f"mtp.{self.c.n_draft_layers - 1}"
        n = len(means[0])
        main = []
        for t in range(n):
            joined = torch.cat([m[t] for m in means])
            projected = w["mtp.0.main_proj.weight"] @ joined
            main.append(rms(projected, w["mtp.0.main_norm.weight"], c.norm_eps))
        size, noise = c.dspark.block_size, c.dspark.noise_token_id
        ids = [token] + [noise] * (size - 1)
        streams = [torch.stack([w["embed.weight"][i]] * c.hc_mult) for i in ids]
        for stage in range(c.n_draft_layers):
            streams = self.stage(f"mtp.{stage}", streams, main)
        out_ids, logits, confidence = [], [], []
        before = token
        for x in streams:
            pre = self.mixed(x, f"{last}.hc_head", c.hc_mult)
            scale, base = w[f"{last}.hc_head_scale"], w[f"{last}.hc_head_base"]
            hidden = torch.zeros(c.dim)
            for j in range(c.hc_mult):
                share = 1 / (1 + math.exp(-float(pre[j] * scale[0] + base[j]))) + c.hc_eps
                hidden = hidden + share * x[j]
            said = w["head.weight"] @ rms(hidden, w[f"{last}.norm.weight"], c.norm_eps)
            trait = w[f"{last}.markov_head.markov_w1.weight"][previous(before, said)]
            corrected = said + w[f"{last}.markov_head.markov_w2.weight"] @ trait
            known = torch.cat((hidden, trait))
            chance = float(w[f"{last}.confidence_head.proj.weight"][0] @ known)
            confidence.append(1 / (1 + math.exp(-chance)))
            logits.append(corrected)
            before = int(corrected.argmax())
            out_ids.append(before)
        return out_ids, torch.stack(logits), torch.tensor(confidence)

    def mixed(self, x, at, n):
        flat = x.flatten()
        norm = math.sqrt(float((flat * flat).sum()) / len(flat) + self.c.norm_eps)
        return [float(self.w[f"{at}_fn"][i] @ flat) / norm for i in range(n)]

    def around(self, x, at, inner):
        """One half of a block inside its hyper-connection, for the streams of all tokens."""
        c, n = self.c, self.c.hc_mult
        scale, base = self.w[f"{at}_scale"].tolist(), self.w[f"{at}_base"].tolist()
        inputs, ways = [], []
        for streams in x:
            m = self.mixed(streams, at, n * (2 + n))
            pre = [1 / (1 + math.exp(-(m[j] * scale[0] + base[j]))) + c.hc_eps for j in range(n)]
            post = [2 / (1 + math.exp(-(m[n + j] * scale[1] + base[n + j]))) for j in range(n)]
            grid = torch.tensor(
                [[m[2 * n + n * j + k] * scale[2] + base[2 * n + n * j + k] for k in range(n)]
                 for j in range(n)]
            )  # fmt: skip
            grid = grid.exp() / grid.exp().sum(1, keepdim=True) + c.hc_eps
            grid = grid / (grid.sum(0, keepdim=True) + c.hc_eps)
            for _ in range(c.hc_sinkhorn_iters - 1):
                grid = grid / (grid.sum(1, keepdim=True) + c.hc_eps)
                grid = grid / (grid.sum(0, keepdim=True) + c.hc_eps)
            inputs.append(sum(pre[j] * streams[j] for j in range(n)))
            ways.append((post, grid))
        out = []
        for streams, (post, grid), f in zip(x, ways, inner(inputs), strict=True):
            kept = [sum(grid[j, k] * streams[j] for j in range(n)) for k in range(n)]
            out.append(torch.stack([kept[k] + post[k] * f for k in range(n)]))
        return out

    def stage(self, at, x, main):
        w, eps = self.w, self.c.norm_eps

        def attended(inputs):
            normed = [rms(u, w[f"{at}.attn_norm.weight"], eps) for u in inputs]
            return self.attention(f"{at}.attn", normed, main)

        def fed(inputs):
            normed = [rms(u, w[f"{at}.ffn_norm.weight"], eps) for u in inputs]
            return [self.experts(f"{at}.ffn", u) for u in normed]

        return self.around(self.around(x, f"{at}.hc_attn", attended), f"{at}.hc_ffn", fed)

    def attention(self, at, inputs, main):
        """Each token of the block sees the same rows: the window before it, and the block."""
        w, c, n = self.w, self.c, len(main)
        turn = (c.rope_head_dim, c.rope_theta)

        def row(x, position):
            kv = rms(w[f"{at}.wkv.weight"] @ x, w[f"{at}.kv_norm.weight"], c.norm_eps)
            return turned(kv, position, *turn)

        rows = [row(main[t], t) for t in range(max(0, n - c.window_size), n)]
        rows = torch.stack(rows + [row(u, n + i) for i, u in enumerate(inputs)])
        out = []
        for i, u in enumerate(inputs):
            qr = rms(w[f"{at}.wq_a.weight"] @ u, w[f"{at}.q_norm.weight"], c.norm_eps)
            heads = (w[f"{at}.wq_b.weight"] @ qr).view(c.n_heads, c.head_dim)
            done = []
            for h in range(c.n_heads):
                q = turned(rms(heads[h], 1.0, c.norm_eps), n + i, *turn)
                scores = rows @ q / math.sqrt(c.head_dim)
                top = scores.max()
                shares = (scores - top).exp()
                o = shares @ rows / (shares.sum() + (w[f"{at}.attn_sink"][h] - top).exp())
                done.append(turned(o, n + i, *turn, sign=-1))
            grouped = torch.cat(done).view(c.o_groups, -1)
            wo_a = w[f"{at}.wo_a.weight"].view(c.o_groups, c.o_lora_rank, -1)
            z = torch.cat([wo_a[g] @ grouped[g] for g in range(c.o_groups)])
            out.append(w[f"{at}.wo_b.weight"] @ z)
        return out

    def experts(self, at, x):
        w, c = self.w, self.c

        def expert(name, weight):
            gate = torch.clamp(w[f"{name}.w1.weight"] @ x, max=c.swiglu_limit)
            up = torch.clamp(w[f"{name}.w3.weight"] @ x, -c.swiglu_limit, c.swiglu_limit)
            return w[f"{name}.w2.weight"] @ (weight * gate / (1 + torch.exp(-gate)) * up)

        said = w[f"{at}.gate.weight"] @ x
        score = [math.sqrt(math.log1p(math.exp(float(s)))) for s in said]
        by_bias = [s + float(b) for s, b in zip(score, w[f"{at}.gate.bias"], strict=True)]
        order = sorted(range(len(score)), key=lambda e: -by_bias[e])[: c.n_activated_experts]
        total = sum(score[e] for e in order)
        out = expert(f"{at}.shared_experts", 1.0)
        for e in order:
            out = out + expert(f"{at}.experts.{e}", score[e] / total * c.route_scale)
        return out
