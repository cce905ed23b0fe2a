// x Q^T for tens of tokens: float32 sums of one share of the columns each, or the result where there is one share.
//
// A block takes 128 TILES rows, 8 TOKEN_TILES tokens and some stages of columns: every warp has rows of its own, and all
// share the inputs, which pass through a ring in shared memory. Grid (parts of the rows, shares, tiles of tokens).

#define RING 3
#define TOKEN_BYTES (COLUMNS * 2 + 64)  // of a stage's inputs in shared memory; 64 more, so that banks differ

template <int BITS, int SCALE_BITS, int TOKEN_TILES, int TILES, int PER_BLOCK, bool EVEN>
__global__ void __launch_bounds__(256, 1) more_tokens(
    const Matrix m, const u16* __restrict__ x, float* __restrict__ partial, u16* __restrict__ y, int tokens, int share) {
  constexpr int T = TOKEN_TILES * 8;
  extern __shared__ __align__(1024) u8 shared[];
  u32 ring = (u32)__cvta_generic_to_shared(shared), table = table_address(shared);
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int first_tile = (blockIdx.x * 8 + warp) * TILES, stages = (m.chunks + U - 1) / U;
  int begin = blockIdx.y * share, end = min(begin + share, stages);
  x += (size_t)blockIdx.z * T * m.columns;
  y += (size_t)blockIdx.z * T * m.rows;
  partial += ((size_t)blockIdx.y * tokens + blockIdx.z * T) * m.rows;
  tokens = min(tokens - (int)blockIdx.z * T, T);
  auto bring = [&](int stage) {
    if (stage < end) {
      u32 to = ring + (stage % RING) * (T * TOKEN_BYTES);
#pragma unroll
      for (int i = threadIdx.x; i < T * 16; i += 256) {
        int token = i / 16, piece = i % 16, column = stage * COLUMNS + piece * 8;
        const u16* from = x + (size_t)min(token, tokens - 1) * m.columns + min(column, m.columns - 8);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + token * TOKEN_BYTES + piece * 16),
                     "l"(from), "r"(column < m.columns ? 16 : 0));  // zeros where there are no columns
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  using S = Stage<BITS, TILES, PER_BLOCK>;
  S now, next;
  if (begin < end) fetch<BITS, SCALE_BITS, TILES, PER_BLOCK, EVEN>(now, m, first_tile, begin, g, t);
  bring(begin);
  bring(begin + 1);
  float offset = __ldg(m.offset);
  fill_table<BITS>(shared, table, m.table, warp, 8, lane);
  u32 entry = table | (lane * 4);
  float acc[TILES][TOKEN_TILES][4] = {};
  for (int stage = begin; stage < end; ++stage) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    asm volatile("" : "+r"(entry)::"memory");  // no look-up before the table is there
    bring(stage + 2);
    if (stage + 1 < end) fetch<BITS, SCALE_BITS, TILES, PER_BLOCK, EVEN>(next, m, first_tile, stage + 1, g, t);
    u32 held = ring + (stage % RING) * (T * TOKEN_BYTES) + g * TOKEN_BYTES + t * 16;
    float scales[TILES][2];
    scales_of(scales, now, offset);
#pragma unroll
    for (int block = 0; block < S::BLOCKS; ++block) {
      float sums[TILES][TOKEN_TILES][4];
#pragma unroll
      for (int c = 0; c < PER_BLOCK; ++c) {
        int u = block * PER_BLOCK + c;
        u32 p[TILES][4], q[TILES][4];
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
          look_up<BITS>(p[r], now.words[r][u][0].x, now.words[r][u][S::WORDS - 1].x, t, entry);
          look_up<BITS>(q[r], now.words[r][u][0].y, now.words[r][u][S::WORDS - 1].y, t, entry);
        }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
          uint4 b;
          asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                       : "=r"(b.x), "=r"(b.y), "=r"(b.z), "=r"(b.w)
                       : "r"(held + n * 8 * TOKEN_BYTES + u * 64));
#pragma unroll
          for (int r = 0; r < TILES; ++r) {
            if (c == 0)
              product(sums[r][n], p[r][0], q[r][0], p[r][1], q[r][1], b.x, b.y);
            else
              add_product(sums[r][n], p[r][0], q[r][0], p[r][1], q[r][1], b.x, b.y);
            add_product(sums[r][n], p[r][2], q[r][2], p[r][3], q[r][3], b.z, b.w);
          }
        }
      }
      add_scaled(acc, sums, scales, block, lane);
    }
    now = next;
  }
  bool direct = gridDim.y == 1;
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        int token = n * 8 + 2 * t + c, row = (first_tile + r) * 16 + 2 * g;
        if (token >= tokens || row >= m.rows) continue;  // rows are even in number
        size_t at = (size_t)token * m.rows + row;
        if (direct)
          *reinterpret_cast<u32*>(y + at) = bf16_pair(acc[r][n][c], acc[r][n][2 + c]);
        else
          *reinterpret_cast<float2*>(partial + at) = make_float2(acc[r][n][c], acc[r][n][2 + c]);
      }
}
