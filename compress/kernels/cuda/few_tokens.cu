// y = x (Q + L1^T L2)^T for at most 8 TOKEN_TILES tokens, in one launch.
//
// A block takes TILES tiles of rows at a time; its warps share the columns out and add their sums in shared memory, in
// order. The low-rank part: units of 16 rows of L2 and an eighth of the columns are spread over the first blocks; every
// block waits for all of them before its first sums are complete, and multiplies by L1 on tensor cores, the inner sums
// as two bfloat16 numbers each. `flags`: units done, blocks done; zero before and after. With factors it is a
// cooperative launch, for blocks wait for blocks; a warp takes 16 ranks, so there are at most 16 WARPS.

#define SHARES 8  // of the columns, of a unit

template <int BITS, int SCALE_BITS, int TOKEN_TILES, int TILES, int WARPS, int PER_BLOCK, bool EVEN, bool LOW_RANK>
__global__ void __launch_bounds__(WARPS * 32, 1) few_tokens(
    const Matrix m, const u16* __restrict__ x, u16* __restrict__ y, int tokens, int parts, const u16* __restrict__ left,
    const u16* __restrict__ right, float* inner, float* inner_sums, int rank, int* flags) {
  extern __shared__ __align__(1024) u8 shared[];
  float* sums_at = reinterpret_cast<float*>(shared);
  using S = Stage<BITS, TILES, PER_BLOCK>;
  constexpr int R = 16 * TILES, T = TOKEN_TILES * 8;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int stages = (m.chunks + U - 1) / U, part = blockIdx.x;
  S now, next;
  if (part < parts && warp < stages)
    fetch<BITS, SCALE_BITS, TILES, PER_BLOCK, EVEN>(now, m, part * TILES, warp, g, t);
  float offset = __ldg(m.offset);
  u32 table = table_address(shared), entry = table | (lane * 4);
  fill_table<BITS>(shared, table, m.table, warp, WARPS, lane);
  const u16* inputs[TOKEN_TILES];  // columns of a fragment's tokens that are not there are never stored
#pragma unroll
  for (int n = 0; n < TOKEN_TILES; ++n) inputs[n] = x + (size_t)min(n * 8 + g, tokens - 1) * m.columns + 8 * t;

  int padded = (rank + 15) & ~15, units = padded / 16 * SHARES;
  if (LOW_RANK) {
    int chunks = (m.columns + 31) / 32, each = (chunks + SHARES - 1) / SHARES;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      int first = unit / SHARES * 16, share = unit % SHARES;
      float c[TOKEN_TILES][4] = {};
      const u16* above = right + (size_t)min(first + g, rank - 1) * m.columns + 8 * t;
      const u16* below = right + (size_t)min(first + g + 8, rank - 1) * m.columns + 8 * t;
      for (int i = share * each + warp; i < min((share + 1) * each, chunks); i += WARPS) {
        bool there = EVEN || i * 32 + 8 * t < m.columns;
        uint4 a = make_uint4(0, 0, 0, 0), b = a;
        if (there) {
          a = __ldg(reinterpret_cast<const uint4*>(above + i * 32));
          b = __ldg(reinterpret_cast<const uint4*>(below + i * 32));
        }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (there) v = __ldg(reinterpret_cast<const uint4*>(inputs[n] + i * 32));
          add_product(c[n], a.x, b.x, a.y, b.y, v.x, v.y);
          add_product(c[n], a.z, b.z, a.w, b.w, v.z, v.w);
        }
      }
      __syncthreads();
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) sums_at[(warp * T + n * 8 + 2 * t + (k & 1)) * 16 + g + 8 * (k >> 1)] = c[n][k];
      __syncthreads();
      for (int i = threadIdx.x; i < 16 * tokens; i += WARPS * 32) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums_at[w * T * 16 + i];
        __stcg(inner + ((size_t)share * tokens + i / 16) * padded + first + i % 16, sum);
      }
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) atomicAdd(flags, 1);
    }
  }
  __syncthreads();
  asm volatile("" : "+r"(entry)::"memory");  // no look-up before the table is there

  bool ready = !LOW_RANK;
  u32 high[TOKEN_TILES][2], low[TOKEN_TILES][2];  // this warp's 16 inner sums of a token, in two parts
  bool multiplies = LOW_RANK && warp * 16 < padded;
  int parity = 0;
  for (; part < parts; part += gridDim.x) {
    float acc[TILES][TOKEN_TILES][4] = {};
    u32 factor[TILES][4];
    if (multiplies) {
#pragma unroll
      for (int r = 0; r < TILES; ++r)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          int at = warp * 16 + 4 * t + k, row = (part * TILES + r) * 16 + 2 * g;
          factor[r][k] = 0;
          if (at < rank && row < m.rows)
            factor[r][k] = __ldg(reinterpret_cast<const u32*>(left + (size_t)at * m.rows + row));
        }
    }
    for (int stage = warp; stage < stages; stage += WARPS) {
      int ahead = stage + WARPS, where = part;
      if (ahead >= stages) {
        ahead = warp;
        where += gridDim.x;
      }
      if (where < parts) fetch<BITS, SCALE_BITS, TILES, PER_BLOCK, EVEN>(next, m, where * TILES, ahead, g, t);
      const u16* here[TOKEN_TILES];
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n) here[n] = inputs[n] + stage * COLUMNS;
      float scales[TILES][2];
      scales_of(scales, now, offset);
#pragma unroll
      for (int block = 0; block < S::BLOCKS; ++block) {
        float sums[TILES][TOKEN_TILES][4];
#pragma unroll
        for (int c = 0; c < PER_BLOCK; ++c) {
          int u = block * PER_BLOCK + c;
          uint4 b[TOKEN_TILES];
#pragma unroll
          for (int n = 0; n < TOKEN_TILES; ++n) {
            b[n] = make_uint4(0, 0, 0, 0);
            if (EVEN || (stage * U + u) * 32 + 8 * t < m.columns)
              b[n] = __ldg(reinterpret_cast<const uint4*>(here[n] + u * 32));
          }
#pragma unroll
          for (int r = 0; r < TILES; ++r) {
            u32 p[4], q[4];
            look_up<BITS>(p, now.words[r][u][0].x, now.words[r][u][S::WORDS - 1].x, t, entry);
            look_up<BITS>(q, now.words[r][u][0].y, now.words[r][u][S::WORDS - 1].y, t, entry);
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
              if (c == 0)
                product(sums[r][n], p[0], q[0], p[1], q[1], b[n].x, b[n].y);
              else
                add_product(sums[r][n], p[0], q[0], p[1], q[1], b[n].x, b[n].y);
              add_product(sums[r][n], p[2], q[2], p[3], q[3], b[n].z, b[n].w);
            }
          }
        }
        add_scaled(acc, sums, scales, block, lane);
      }
      now = next;
    }
    if (!ready) {
      ready = true;
      if (lane == 0) {
        int seen;
        do {
          asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(flags) : "memory");
        } while (seen < units);
      }
      __syncwarp();
      if (multiplies) {
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
          float f[4] = {};
          int token = n * 8 + g, first = warp * 16 + 4 * t;
#pragma unroll
          for (int share = 0; share < SHARES; ++share) {
            const float* at = inner + ((size_t)share * tokens + min(token, tokens - 1)) * padded + first;
            float4 v = __ldcg(reinterpret_cast<const float4*>(at));
            f[0] += v.x, f[1] += v.y, f[2] += v.z, f[3] += v.w;
          }
#pragma unroll
          for (int k = 0; k < 4; ++k)
            if (first + k >= rank) f[k] = 0.f;
          if (blockIdx.x == 0 && token < tokens)
            for (int k = 0; k < 4; ++k)
              if (first + k < rank) inner_sums[(size_t)token * rank + first + k] = f[k];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            high[n][h] = bf16_pair(f[2 * h], f[2 * h + 1]);
            float rest = f[2 * h] - low_of(high[n][h]), more = f[2 * h + 1] - high_of(high[n][h]);
            low[n][h] = bf16_pair(rest == rest ? rest : 0.f, more == more ? more : 0.f);  // inf less inf
          }
        }
      }
    }
    if (multiplies) {
#pragma unroll
      for (int r = 0; r < TILES; ++r) {
        u32 a0 = __byte_perm(factor[r][0], factor[r][1], 0x5410), a1 = __byte_perm(factor[r][0], factor[r][1], 0x7632);
        u32 a2 = __byte_perm(factor[r][2], factor[r][3], 0x5410), a3 = __byte_perm(factor[r][2], factor[r][3], 0x7632);
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
          add_product(acc[r][n], a0, a1, a2, a3, high[n][0], high[n][1]);
          add_product(acc[r][n], a0, a1, a2, a3, low[n][0], low[n][1]);
        }
      }
    }
    constexpr int SIZE = WARPS * R * T;
    constexpr bool TWICE = 8 * SIZE <= SCRATCH;  // room for two parts: then one barrier a part will do
    float* base = sums_at + (TWICE ? parity * SIZE : 0);
    parity ^= 1;
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          int token = n * 8 + 2 * t + (c & 1);
          if (token < tokens) base[(warp * T + token) * R + r * 16 + 2 * g + (c >> 1)] = acc[r][n][c];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < R * tokens; i += WARPS * 32) {
      int row = part * R + i % R;
      if (EVEN || row < m.rows) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += base[w * T * R + i];
        y[(size_t)(i / R) * m.rows + row] = (u16)bf16_pair(sum, 0.f);
      }
    }
    if (!TWICE) __syncthreads();
  }
  if (LOW_RANK) {
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(flags + 1, 1) == (int)gridDim.x - 1) {
      flags[0] = 0;
      flags[1] = 0;
      __threadfence();
    }
  }
}
