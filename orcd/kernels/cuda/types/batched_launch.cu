// A launch for up to 64 things. Each has some of the blocks, from `begin` on.
template<class A> struct BatchedLaunch { A at[64]; long long count; };
template<class A> __device__ __forceinline__ const A& find_item(const BatchedLaunch<A>& m, int block) {
    int i = 0;
    for (int step = 32; step; step /= 2) if (i + step < m.count && m.at[i + step].begin <= block) i += step;
    return m.at[i];
}
